package event

import (
	"encoding/json"

	"github.com/gantryd/gantry/core/typed"
)

func marshalAny(a typed.Any) ([]byte, error) { return json.Marshal(a) }
