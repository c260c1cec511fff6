"""Tests of the sandbox: what good programs do there, and hostile programs under every layer combination."""
