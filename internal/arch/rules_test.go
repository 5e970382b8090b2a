package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"
)

// source is one file that is no test.
type source struct {
	pkg  string // directory below the module, "" is the root
	name string // file name
	file *ast.File
}

// violation is one broken rule.
type violation struct{ rule, where, msg string }

func (v violation) String() string { return v.where + ": " + v.rule + ": " + v.msg }

// load parses every file of the module at root that is no test. Folders with
// their own go.mod, testdata and hidden folders do not belong to it.
func load(root string) (*token.FileSet, []source, error) {
	fset := token.NewFileSet()
	var all []source
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p == root {
				return nil
			}
			if d.Name() == "testdata" || d.Name() == "vendor" || strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "_") {
				return fs.SkipDir
			}
			if _, err := os.Stat(filepath.Join(p, "go.mod")); err == nil {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(fset, p, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(p))
		if err != nil {
			return err
		}
		if rel == "." {
			rel = ""
		}
		all = append(all, source{filepath.ToSlash(rel), d.Name(), f})
		return nil
	})
	return fset, all, err
}

// check applies every rule. The second result are the exceptions that were
// used, by their index.
func check(fset *token.FileSet, all []source) ([]violation, map[int]bool) {
	var vs []violation
	used := map[int]bool{}
	add := func(rule string, s source, pos token.Pos, format string, args ...any) {
		where := path.Join(s.pkg, s.name)
		for i, a := range allowed {
			if a.rule == rule && a.file == where {
				used[i] = true
				return
			}
		}
		if pos.IsValid() {
			where += ":" + strconv.Itoa(fset.Position(pos).Line)
		}
		vs = append(vs, violation{rule, where, fmt.Sprintf(format, args...)})
	}
	comments, first := map[string][]source{}, map[string]source{}
	for _, s := range all {
		if _, ok := first[s.pkg]; !ok {
			first[s.pkg] = s
		}
		if s.file.Doc != nil {
			comments[s.pkg] = append(comments[s.pkg], s)
		}
		imports(s, add)
		style(s, add)
	}
	for pkg, s := range first {
		docs := comments[pkg]
		switch {
		case len(docs) == 0:
			add("package comment", s, token.NoPos, "package %s has none", pkg)
		case len(docs) > 1:
			add("package comment", docs[1], docs[1].file.Package, "package %s has %d, want one", pkg, len(docs))
		default:
			name := docs[0].file.Name.Name
			want := "Package " + name + " "
			if name == "main" {
				want = "Command " + path.Base(pkg) + " "
			}
			if !strings.HasPrefix(docs[0].file.Doc.Text(), want) {
				add("package comment", docs[0], docs[0].file.Package, "want it to begin with %q", want)
			}
		}
	}
	sort.Slice(vs, func(i, j int) bool { return vs[i].String() < vs[j].String() })
	return vs, used
}

type report func(rule string, s source, pos token.Pos, format string, args ...any)

// imports checks one file against the table of layers.
func imports(s source, add report) {
	l := layerOf(s.pkg)
	if l == nil {
		add("layer", s, token.NoPos, "package %s stands in no layer", s.pkg)
		return
	}
	// A conformance suite of a noun may touch what a test may touch.
	suite := l.dir == "core" && strings.HasSuffix(path.Base(s.pkg), "test")
	for _, spec := range s.file.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue
		}
		if p == module || strings.HasPrefix(p, module+"/") {
			local := strings.TrimPrefix(strings.TrimPrefix(p, module), "/")
			own := s.pkg != "" && (below(local, s.pkg) || below(s.pkg, local)) && layerOf(local) == l
			switch {
			case l.apart:
				mine, theirs := folder(s.pkg, l.dir), folder(local, l.dir)
				if below(local, l.dir) && theirs != mine && !contains(l.except, theirs) {
					add("apart", s, spec.Pos(), "%s imports %s: two of %s never import each other", s.pkg, local, l.dir)
					continue
				}
				if below(local, l.dir) {
					continue
				}
			case own:
				continue
			}
			if !belowAny(local, l.local) {
				add("layer", s, spec.Pos(), "%s may not import %s", s.pkg, local)
			}
			continue
		}
		root, _, _ := strings.Cut(p, "/")
		if !strings.Contains(root, ".") { // standard library
			if contains(l.never, p) && !suite {
				add("layer", s, spec.Pos(), "%s may not import %s", s.pkg, p)
			}
			continue
		}
		for _, o := range owned {
			if below(p, o.module) && !belowAny(p, ownedExcept) && !belowAny(s.pkg, o.only) {
				add("owned module", s, spec.Pos(), "%s may not import %s, only %s may", s.pkg, p, strings.Join(o.only, ", "))
			}
		}
		if bolt := below(p, "go.etcd.io/bbolt"); !bolt && !(suite && belowAny(p, suiteModules)) && !belowAny(p, l.external) {
			add("module", s, spec.Pos(), "%s is not on the list of %q", p, l.dir)
		}
	}
}

// folder is the first step of a package below dir.
func folder(pkg, dir string) string {
	f, _, _ := strings.Cut(strings.TrimPrefix(pkg, dir+"/"), "/")
	return f
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}

// banned are functions that no file calls, by import path and name.
var banned = map[string]map[string]string{
	"context":   {"WithValue": "a context carries deadline, cancellation and trace, nothing else"},
	"io":        {"ReadAll": "read with a limit"},
	"io/ioutil": {"ReadAll": "read with a limit"},
}

// style checks what one file contains.
func style(s source, add report) {
	names := map[string]string{} // identifier to import path
	for _, spec := range s.file.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue
		}
		name := path.Base(p)
		if spec.Name != nil {
			name = spec.Name.Name
		}
		names[name] = p
	}
	for _, d := range s.file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
			add("init", s, f.Pos(), "nothing happens before main; build it in wire.go")
		}
	}
	limited := map[ast.Node]bool{} // calls of ReadAll whose argument is a limit
	ast.Inspect(s.file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if limited[n] {
				return true
			}
			if id, ok := n.X.(*ast.Ident); ok {
				if why := banned[names[id.Name]][n.Sel.Name]; why != "" {
					add("banned call", s, n.Pos(), "%s.%s: %s", id.Name, n.Sel.Name, why)
				}
			}
		case *ast.CallExpr:
			sel, ok := n.Fun.(*ast.SelectorExpr)
			if !ok || len(n.Args) == 0 {
				return true
			}
			id, ok := sel.X.(*ast.Ident)
			if ok && names[id.Name] == "io" && sel.Sel.Name == "ReadAll" && isLimit(n.Args[0], names) {
				limited[sel] = true // parents are visited first
			}
			if !ok || !(names[id.Name] == "fmt" && sel.Sel.Name == "Errorf" || names[id.Name] == "errors" && sel.Sel.Name == "New") {
				return true
			}
			for _, arg := range n.Args {
				ast.Inspect(arg, func(m ast.Node) bool {
					lit, ok := m.(*ast.BasicLit)
					if ok && lit.Kind == token.STRING {
						text := strings.ToLower(lit.Value)
						for _, phrase := range []string{"failed to", "error while", "unable to"} {
							if strings.Contains(text, phrase) {
								add("error text", s, lit.Pos(), "%s: say what was attempted on what, then the cause", lit.Value)
							}
						}
					}
					return true
				})
			}
		}
		return true
	})
}

// isLimit tells whether an expression is io.LimitReader(...) or
// io.NewSectionReader(...).
func isLimit(e ast.Expr, names map[string]string) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok {
		return false
	}
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && names[id.Name] == "io" && (sel.Sel.Name == "LimitReader" || sel.Sel.Name == "NewSectionReader")
}

// TestHouse applies the rules to the tree.
func TestHouse(t *testing.T) {
	fset, all, err := load(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 10 {
		t.Fatalf("only %d files found", len(all))
	}
	vs, used := check(fset, all)
	for _, v := range vs {
		t.Error(v)
	}
	for i, a := range allowed {
		if !used[i] {
			t.Errorf("the exception %q for %s is not needed any more", a.rule, a.file)
		}
	}
}

// TestRulesBite proves that each rule can fail: the tree in testdata/bad
// breaks every one, and each file says in a comment which.
func TestRulesBite(t *testing.T) {
	root := filepath.Join("testdata", "bad")
	fset, all, err := load(root)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	vs, _ := check(fset, all)
	for _, v := range vs {
		file, _, _ := strings.Cut(v.where, ":")
		got[file+" "+v.rule] = true
	}
	want := map[string]bool{}
	for _, s := range all {
		for _, g := range s.file.Comments {
			for _, c := range g.List {
				if rules, ok := strings.CutPrefix(c.Text, "// breaks: "); ok {
					for _, r := range strings.Split(rules, ", ") {
						want[path.Join(s.pkg, s.name)+" "+r] = true
					}
				}
			}
		}
	}
	for k := range want {
		if !got[k] {
			t.Errorf("not found: %s", k)
		}
	}
	for k := range got {
		if !want[k] {
			t.Errorf("found although it is right: %s", k)
		}
	}
	if len(want) < 12 {
		t.Errorf("the bad tree breaks only %d rules", len(want))
	}
}
