// Package snapmeta is what containerd's snapshotters of plain directories have
// in common: a metastore in the file metadata.db, whose layout is containerd's
// to the byte, so that a root can go from one daemon to the other and back, and
// the directories snapshots/<id> that it speaks of. A record is durable before
// anybody hears of it, its directory before the record; what is removed loses
// its record first. No file is touched inside a transaction, and no request
// waits for another one's files. It is one of the two packages that know bbolt.
package snapmeta
