// Package typo finds what somebody meant who wrote something else.
package typo

// Closest is the word of known that is nearest to what was written, "" if none
// is within most letters; of several the first.
func Closest(written string, known []string, most int) string {
	best := ""
	for _, k := range known {
		if d := Distance(written, k, most); d <= most {
			best, most = k, d-1
		}
	}
	return best
}

// Distance is how many letters must change to make b of a, or more than most
// if it is more.
func Distance(a, b string, most int) int {
	if len(a)-len(b) > most || len(b)-len(a) > most {
		return most + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		corner := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := corner
			if a[i] != b[j] {
				d = 1 + min(corner, row[j], row[j+1])
			}
			corner, row[j+1] = row[j+1], d
		}
	}
	return row[len(b)]
}
