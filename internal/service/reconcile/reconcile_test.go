package reconcile

import "testing"

// Every combination of facts is decided on, and the decision keeps the
// promises that matter: nothing silent or unsure is ever killed or removed,
// nothing dead is adopted, nothing that nobody knows stays.
//
// contract: 5.4.1, 5.4.2
// promise: P6
func TestEveryPair(t *testing.T) {
	n := 0
	for _, deleted := range []bool{false, true} {
		for _, bundle := range []bool{false, true} {
			for _, unfinished := range []bool{false, true} {
				for shim := ShimNone; shim <= ShimAlive; shim++ {
					for task := Unsure; task <= Yes; task++ {
						for record := Unsure; record <= Yes; record++ {
							for sandbox := Unsure; sandbox <= Yes; sandbox++ {
								f := Facts{deleted, bundle, unfinished, shim, task, record, sandbox}
								check(t, f, Decide(f))
								n++
							}
						}
					}
				}
			}
		}
	}
	if n != 2*2*2*4*27 {
		t.Fatalf("%d combinations", n)
	}
}

func check(t *testing.T, f Facts, a Action) {
	fail := func(why string) { t.Errorf("%+v: %s: %s", f, a, why) }
	if (a == Sweep) != (f.Deleted || !f.Bundle) {
		fail("swept is exactly what is renamed or has no bundle")
	}
	if a == Sweep {
		return
	}
	if f.Shim == ShimSilent && a != Await {
		fail("a silent shim is waited for")
	}
	if a == Await && f.Shim != ShimSilent {
		fail("only a silent shim is waited for")
	}
	if a == Adopt && (f.Shim != ShimAlive || f.Unfinished || f.Task == No) {
		fail("only what lives, is finished and known to its shim is adopted")
	}
	if a == Evict && !f.Unfinished && f.Task != No && (f.Record != No || f.Sandbox != No) {
		fail("a living task is killed only if the store knows surely that it is nobody's")
	}
	if f.Shim == ShimAlive && !f.Unfinished && f.Task == Yes && f.Record == No && f.Sandbox == No && a != Evict {
		fail("a leaked shim stays")
	}
	if f.Shim == ShimDead && !f.Unfinished && a != Bury {
		fail("whoever waits for a dead one is to be told")
	}
	if a == Bury && f.Shim != ShimDead {
		fail("only the dead are buried")
	}
}

// contract: 5.4.1, 5.4.3
func TestTable(t *testing.T) {
	live := Facts{Bundle: true, Shim: ShimAlive, Task: Yes, Record: Yes, Sandbox: No}
	change := func(f func(*Facts)) Facts { g := live; f(&g); return g }
	for name, c := range map[string]struct {
		f    Facts
		want Action
	}{
		"as it should be":         {live, Adopt},
		"store cannot say":        {change(func(f *Facts) { f.Record = Unsure }), Adopt},
		"shim errs about task":    {change(func(f *Facts) { f.Task = Unsure }), Adopt},
		"record gone":             {change(func(f *Facts) { f.Record = No }), Evict},
		"record gone, a sandbox":  {change(func(f *Facts) { f.Record, f.Sandbox = No, Yes }), Adopt},
		"task gone":               {change(func(f *Facts) { f.Task = No }), Evict},
		"sandbox's shim":          {change(func(f *Facts) { f.Task, f.Record, f.Sandbox = No, No, Yes }), Leave},
		"shim dead":               {change(func(f *Facts) { f.Shim = ShimDead }), Bury},
		"shim stopped":            {change(func(f *Facts) { f.Shim = ShimSilent }), Await},
		"stopped and unfinished":  {change(func(f *Facts) { f.Shim, f.Unfinished = ShimSilent, true }), Await},
		"create cut, shim alive":  {change(func(f *Facts) { f.Unfinished = true }), Evict},
		"create cut, shim dead":   {change(func(f *Facts) { f.Unfinished, f.Shim = true, ShimDead }), Discard},
		"create cut, no shim":     {change(func(f *Facts) { f.Unfinished, f.Shim = true, ShimNone }), Discard},
		"no address":              {change(func(f *Facts) { f.Shim = ShimNone }), Discard},
		"deletion cut":            {Facts{Deleted: true, Bundle: true}, Sweep},
		"work without bundle":     {Facts{}, Sweep},
		"no address, record gone": {change(func(f *Facts) { f.Shim, f.Record = ShimNone, No }), Discard},
	} {
		if got := Decide(c.f); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
