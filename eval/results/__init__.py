"""Results of evaluations: their types, the files they are stored in, and the rows that tables are made of."""
