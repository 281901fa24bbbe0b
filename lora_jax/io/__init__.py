"""File formats: the only place that knows them."""
