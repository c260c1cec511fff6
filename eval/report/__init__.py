"""Tables, LaTeX, model cards, figures and the HTML page that show results; no statistics of their own."""
