"""What people look at: a snapshot of a run as plain data, tables in the terminal, plots. Reads views, changes nothing."""
