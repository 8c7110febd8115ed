"""Any image in: headers, upright RGB, sizes, patches; and every count of tokens."""
