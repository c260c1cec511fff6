"""Compiled inner loops in C: optional, with the same bits as the torch operations. No method is defined here."""
