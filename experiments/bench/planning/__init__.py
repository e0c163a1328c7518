"""Plans of products: cases that are drawn, their times when queued in a row, the report, and costs fitted to times."""
