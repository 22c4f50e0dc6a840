"""Reading a captured graph: its operations, who shares storage with whom, what a tensor's dims and rows are."""
