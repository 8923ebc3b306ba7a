"""What a recorded run is shown as: findings, a table in the terminal, a page for the browser, a trace for Perfetto."""
