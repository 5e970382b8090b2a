// Package somewhere stands in no room.
// breaks: layer
package somewhere
