"""Pictures and the page of a report."""
