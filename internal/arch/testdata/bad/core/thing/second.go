// Package thing has a second comment.
// breaks: package comment
package thing
