// Package inner belongs to a.
package inner

import _ "github.com/gantryd/gantry/core/thing"
