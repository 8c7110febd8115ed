"""Every op on every backend against float64, by rules that the tests share."""
