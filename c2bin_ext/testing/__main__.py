"""Print the table of invariants that the page on the testing kit has."""

from c2bin_ext.testing._suite import table

print(table())
