"""How a result is written: staging, journals, checks before it is published. What is computed is not decided here."""
