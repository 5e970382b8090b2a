package crispec

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/oci"
)

// Identity is who a container shall run as. Both kinds of security context have
// it; Username is the container's alone.
type Identity struct {
	User, Group *runtime.Int64Value
	Username    string
	Groups      []int64
	Policy      runtime.SupplementalGroupsPolicy
	// ImageUser is used if neither User nor Username is set.
	ImageUser string
}

// ContainerIdentity is what a container's configuration asks for.
func ContainerIdentity(c *runtime.ContainerConfig, imageUser string) Identity {
	sc := c.GetLinux().GetSecurityContext()
	return Identity{sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername(), sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy(), imageUser}
}

// SandboxIdentity is what a pod's configuration asks for.
func SandboxIdentity(c *runtime.PodSandboxConfig, imageUser string) Identity {
	sc := c.GetLinux().GetSecurityContext()
	return Identity{sc.GetRunAsUser(), sc.GetRunAsGroup(), "", sc.GetSupplementalGroups(), sc.GetSupplementalGroupsPolicy(), imageUser}
}

// Files opens "etc/passwd" or "etc/group" of an image, inside its root. An
// error that is fs.ErrNotExist means that the image has none.
type Files func(name string) (io.ReadCloser, error)

// ResolveUser finds user and groups. files may be nil. With the policy Merge
// the groups that the image gives the user are added to those of the request,
// with Strict they are not (contract 7.3.9). A user that looks like a number is
// never looked up as a name, and an id beyond 2147483647 is ErrOutOfRange (class
// C3); see oci.ResolveUser for the other errors.
func ResolveUser(id Identity, files Files) (specs.User, error) {
	var none specs.User
	user := id.Username
	if user == "" && id.User != nil {
		n, err := checkID("run_as_user", id.User.GetValue())
		if err != nil {
			return none, err
		}
		user = n
	}
	if strings.Contains(user, ":") {
		return none, fmt.Errorf("run_as_username %q holds a colon: %w", short(user), errdefs.ErrInvalidArgument)
	}
	if id.Group != nil {
		if user == "" {
			return none, fmt.Errorf("run_as_group %d without run_as_user: %w", id.Group.GetValue(), errdefs.ErrInvalidArgument)
		}
		n, err := checkID("run_as_group", id.Group.GetValue())
		if err != nil {
			return none, err
		}
		user += ":" + n
	}
	groups := make([]uint32, 0, len(id.Groups))
	for _, g := range id.Groups {
		if _, err := checkID("supplemental group", g); err != nil {
			return none, err
		}
		groups = append(groups, uint32(g))
	}
	user = cmp.Or(user, id.ImageUser)
	u, err := withFiles(files, func(passwd, group io.Reader) (specs.User, error) { return oci.ResolveUser(passwd, group, user) })
	if err != nil {
		return none, err
	}
	// The primary group stays among the additional ones: without it a process
	// could drop the group that a file denies rights to.
	all := []uint32{u.GID}
	switch id.Policy {
	case runtime.SupplementalGroupsPolicy_Merge:
		name, _, _ := strings.Cut(user, ":")
		member, err := withFiles(files, func(passwd, group io.Reader) ([]uint32, error) { return oci.Memberships(passwd, group, name) })
		if err != nil {
			return none, err
		}
		all = append(all, member...)
	case runtime.SupplementalGroupsPolicy_Strict:
	default:
		return none, fmt.Errorf("supplemental groups policy %d is unknown: %w", id.Policy, errdefs.ErrInvalidArgument)
	}
	u.AdditionalGids = slices.Concat(all, groups)
	slices.Sort(u.AdditionalGids) // as a container's status has always listed them
	u.AdditionalGids = slices.Compact(u.AdditionalGids)
	return u, nil
}

func checkID(what string, n int64) (string, error) {
	if n < 0 || n > math.MaxInt32 {
		return "", fmt.Errorf("%s %d: want 0 to %d: %w", what, n, math.MaxInt32, errdefs.ErrOutOfRange)
	}
	return strconv.FormatInt(n, 10), nil
}

// withFiles calls fn with both files open, nil for one that does not exist.
func withFiles[T any](files Files, fn func(passwd, group io.Reader) (T, error)) (T, error) {
	var zero T
	var readers [2]io.Reader
	for i, name := range []string{"etc/passwd", "etc/group"} {
		if files == nil {
			break
		}
		f, err := files(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return zero, fmt.Errorf("open the image's %s: %w", name, err)
		}
		defer f.Close()
		readers[i] = f
	}
	return fn(readers[0], readers[1])
}

func short(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}
