// What the images of Kubernetes' validation suite have and busybox has not.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
	if (strstr(argv[0], "nonewprivs")) {
		printf("Effective uid: %d\n", geteuid());
		return 0;
	}
	// Debian's static busybox runs "ls" inside of its shell, whatever is at
	// /bin/ls. The suite's shell executes what a command of one word names.
	if (argc == 3 && !strcmp(argv[1], "-c") && !argv[2][strspn(argv[2], "abcdefghijklmnopqrstuvwxyz")]) {
		execlp(argv[2], argv[2], NULL);
		fprintf(stderr, "%s: %s: %s\n", argv[0], argv[2], strerror(errno));
		return 126;
	}
	argv[0] = "sh";
	execv("/bin/busybox", argv);
	return 127;
}
