"""Whether a layer, of whatever origin, does what the paper says: laws, and a suite that tries them."""
