"""Isolation of a program by the kernel: namespaces, Landlock, seccomp, resource limits. No program is started here."""
