package oci

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Limits on what an image may hold in its user database. It is read line by
// line and never kept.
const (
	maxDatabase  = 8 << 20 // bytes of passwd, and of group
	maxLine      = 1 << 20 // bytes of one line
	maxGroups    = 65536   // of one user: what the kernel takes
	maxUserInput = 512     // bytes of a user string
)

// ResolveUser turns a user string into ids. The string is "", "user",
// "user:group", where each is a name or a decimal number; "" is root.
//
//   - A string that looks like a number, whatever its sign, spaces, digits or
//     prefix, is never looked up as a name: it is a number from 0 to 2147483647
//     in plain decimal digits, or an error. Nothing wraps around to 0.
//   - A name has to be in passwd (a group in group).
//   - Without a group the primary group is that of the passwd entry, 0 if there
//     is none, and the groups that list the user in group are additional ones.
//     With a group that is the only one.
//   - AdditionalGids always hold the primary group first.
//
// passwd and group may be nil, which is the same as empty. They are the
// image's and may be hostile: at most 8 MiB of each are read, in lines of at
// most 1 MiB. Errors: ErrInvalidArgument for a bad string, ErrNotFound for an
// unknown name, ErrOutOfRange for an id that is too large and for a file
// beyond the limits.
func ResolveUser(passwd, group io.Reader, user string) (specs.User, error) {
	u, err := resolveUser(passwd, group, user)
	if err != nil {
		return specs.User{}, fmt.Errorf("resolve user %q: %w", shorten(user), err)
	}
	return u, nil
}

func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

func resolveUser(passwd, group io.Reader, user string) (specs.User, error) {
	if len(user) > maxUserInput {
		return specs.User{}, fmt.Errorf("longer than %d bytes: %w", maxUserInput, errdefs.ErrInvalidArgument)
	}
	name, groupName, hasGroup := strings.Cut(user, ":")
	if user == "" {
		name = "0"
	}
	if name == "" || hasGroup && (groupName == "" || strings.Contains(groupName, ":")) {
		return specs.User{}, fmt.Errorf("want user or user:group: %w", errdefs.ErrInvalidArgument)
	}
	var u specs.User
	uid, byNumber, err := parseID(name)
	if err != nil {
		return u, err
	}
	if err := checkName(name, byNumber); err != nil {
		return u, err
	}
	login := name // the name by which groups list the user
	found := false
	if byNumber {
		login = ""
	}
	err = entries(passwd, "passwd", func(f []string) (bool, error) {
		if len(f) < 4 {
			return false, nil
		}
		id, ok, idErr := parseID(f[2])
		if byNumber && (idErr != nil || !ok || id != uid) || !byNumber && f[0] != name {
			return false, nil
		}
		if idErr != nil || !ok {
			return false, fmt.Errorf("user id %q in passwd: %w", shorten(f[2]), outOfRange(idErr))
		}
		gid, ok, gidErr := parseID(f[3])
		if gidErr != nil || !ok {
			if hasGroup { // it does not matter
				gid = 0
			} else {
				return false, fmt.Errorf("group id %q in passwd: %w", shorten(f[3]), outOfRange(gidErr))
			}
		}
		u.UID, u.GID, login, found = id, gid, f[0], true
		return true, nil
	})
	if err != nil {
		return specs.User{}, err
	}
	if !found {
		if !byNumber {
			return specs.User{}, fmt.Errorf("no such user in the image's passwd: %w", errdefs.ErrNotFound)
		}
		u.UID = uid
	}
	if hasGroup {
		gid, err := resolveGroup(group, groupName)
		if err != nil {
			return specs.User{}, err
		}
		u.GID, u.AdditionalGids = gid, []uint32{gid}
		return u, nil
	}
	if login == "" && u.UID == 0 {
		login = "root"
	}
	u.AdditionalGids, err = memberships(group, login, []uint32{u.GID})
	if err != nil {
		return specs.User{}, err
	}
	return u, nil
}

// Memberships are the groups that list a user, a name or a number without a
// group, by the rules and with the errors of ResolveUser; an unknown user has
// none.
func Memberships(passwd, group io.Reader, user string) ([]uint32, error) {
	uid, byNumber, err := parseID(user)
	if err != nil {
		return nil, fmt.Errorf("groups of user %q: %w", shorten(user), err)
	}
	login := user
	if byNumber || user == "" {
		login = ""
		err = entries(passwd, "passwd", func(f []string) (bool, error) {
			if len(f) < 4 {
				return false, nil
			}
			if id, ok, err := parseID(f[2]); err != nil || !ok || id != uid {
				return false, nil
			}
			login = f[0]
			return true, nil
		})
		if err != nil {
			return nil, fmt.Errorf("groups of user %q: %w", shorten(user), err)
		}
		if login == "" && uid == 0 {
			login = "root"
		}
	}
	gids, err := memberships(group, login, nil)
	if err != nil {
		return nil, fmt.Errorf("groups of user %q: %w", shorten(user), err)
	}
	return gids, nil
}

// memberships adds the groups that list login to gids.
func memberships(group io.Reader, login string, gids []uint32) ([]uint32, error) {
	if login == "" {
		return gids, nil
	}
	seen := map[uint32]bool{}
	for _, g := range gids {
		seen[g] = true
	}
	err := entries(group, "group", func(f []string) (bool, error) {
		if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), login) {
			return false, nil
		}
		gid, ok, err := parseID(f[2])
		if err != nil || !ok {
			return false, fmt.Errorf("group id %q of %q: %w", shorten(f[2]), shorten(f[0]), outOfRange(err))
		}
		if !seen[gid] {
			if len(gids) >= maxGroups {
				return false, fmt.Errorf("more than %d groups: %w", maxGroups, errdefs.ErrOutOfRange)
			}
			seen[gid] = true
			gids = append(gids, gid)
		}
		return false, nil
	})
	return gids, err
}

// outOfRange is the class of a bad id in a file: the image is at fault.
func outOfRange(err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("not a number: %w", errdefs.ErrInvalidArgument)
}

// ResolveGroups turns names and numbers of groups into ids, by the rules of
// ResolveUser. Each name costs one pass over group, so group is a function that
// opens it anew.
func ResolveGroups(group func() (io.Reader, error), names ...string) ([]uint32, error) {
	var gids []uint32
	for _, name := range names {
		var r io.Reader
		if _, byNumber, _ := parseID(name); !byNumber && group != nil {
			var err error
			if r, err = group(); err != nil {
				return nil, fmt.Errorf("resolve group %q: %w", shorten(name), err)
			}
		}
		gid, err := resolveGroup(r, name)
		if err != nil {
			return nil, fmt.Errorf("resolve group: %w", err)
		}
		if !slices.Contains(gids, gid) {
			gids = append(gids, gid)
		}
	}
	return gids, nil
}

func resolveGroup(group io.Reader, name string) (uint32, error) {
	gid, byNumber, err := parseID(name)
	if err != nil || byNumber {
		return gid, err
	}
	if err := checkName(name, false); err != nil {
		return 0, err
	}
	found := false
	err = entries(group, "group", func(f []string) (bool, error) {
		if len(f) < 3 || f[0] != name {
			return false, nil
		}
		id, ok, err := parseID(f[2])
		if err != nil || !ok {
			return false, fmt.Errorf("group id %q of %q: %w", shorten(f[2]), name, outOfRange(err))
		}
		gid, found = id, true
		return true, nil
	})
	if err != nil {
		return 0, err
	}
	if !found {
		return 0, fmt.Errorf("no group %q in the image's group file: %w", name, errdefs.ErrNotFound)
	}
	return gid, nil
}

// parseID reads an id. number tells that s is to be taken as one; then it is
// valid, or err says why not. Everything a parser somewhere might read as a
// number counts as one: signs, prefixes, separators, digits of other scripts,
// spaces around.
func parseID(s string) (id uint32, number bool, err error) {
	plain := s != ""
	for _, r := range s {
		if r < '0' || r > '9' {
			plain = false
		}
	}
	if plain {
		digits := strings.TrimLeft(s, "0")
		if digits == "" {
			return 0, true, nil
		}
		n, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || n > math.MaxInt32 {
			return 0, true, fmt.Errorf("id %s is larger than %d: %w", shorten(s), math.MaxInt32, errdefs.ErrOutOfRange)
		}
		return uint32(n), true, nil
	}
	if looksNumeric(s) {
		return 0, true, fmt.Errorf("id %q is not written in plain decimal digits: %w", shorten(s), errdefs.ErrInvalidArgument)
	}
	return 0, false, nil
}

// looksNumeric tells whether anyone could take s for a number.
func looksNumeric(s string) bool {
	t := strings.TrimFunc(s, func(r rune) bool { return unicode.IsSpace(r) || r == 0 || !unicode.IsGraphic(r) })
	t = strings.TrimLeft(t, "+-\u2212\uff0b\uff0d")
	if t == "" {
		return s != "" && strings.ContainsAny(s, "+-\u2212\uff0b\uff0d")
	}
	digits := 0
	for _, r := range t {
		switch {
		case unicode.IsDigit(r) || unicode.IsNumber(r):
			digits++
		case r == '_' || r == '.' || r == ',' || unicode.IsSpace(r):
		default:
			// 0x1f, 0b1, 0o7, 1e3
			_, err := strconv.ParseInt(t, 0, 64)
			if err == nil || strings.Contains(err.Error(), strconv.ErrRange.Error()) {
				return true
			}
			_, err = strconv.ParseFloat(t, 64)
			if err == nil || strings.Contains(err.Error(), strconv.ErrRange.Error()) {
				return first(t) // inf and nan are good names
			}
			return false
		}
	}
	return digits > 0
}

func first(t string) bool { return t[0] >= '0' && t[0] <= '9' || t[0] == '.' }

// checkName refuses what no user database can hold.
func checkName(name string, byNumber bool) error {
	if byNumber {
		return nil
	}
	for _, r := range name {
		if unicode.IsSpace(r) || unicode.IsControl(r) || r == unicode.ReplacementChar || r == ',' || r == '/' {
			return fmt.Errorf("%q is neither a name nor a number: %w", shorten(name), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// entries calls fn with the fields of each line until it says done. Comments,
// empty lines and NIS markers are no entries.
func entries(r io.Reader, file string, fn func(fields []string) (done bool, err error)) error {
	if r == nil {
		return nil
	}
	limited := &io.LimitedReader{R: r, N: maxDatabase + 1}
	sc := bufio.NewScanner(limited)
	sc.Buffer(make([]byte, 0, 4096), maxLine)
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' || line[0] == '+' || line[0] == '-' {
			continue
		}
		done, err := fn(strings.Split(line, ":"))
		if err != nil || done {
			return err
		}
	}
	if err := sc.Err(); err != nil {
		if err == bufio.ErrTooLong {
			return fmt.Errorf("read the image's %s: a line is longer than %d bytes: %w", file, maxLine, errdefs.ErrOutOfRange)
		}
		return fmt.Errorf("read the image's %s: %w", file, err)
	}
	if limited.N <= 0 {
		return fmt.Errorf("read the image's %s: larger than %d bytes: %w", file, maxDatabase, errdefs.ErrOutOfRange)
	}
	return nil
}
