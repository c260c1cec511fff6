"""Compiled inner loops: optional, built where there is a C compiler, the same bits as the plain ones."""
