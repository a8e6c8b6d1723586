"""Jobs chained by artifacts, and the session in which any job runs."""
