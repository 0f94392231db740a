"""The Report and what is made of one: errors of its figures, table, model card."""
