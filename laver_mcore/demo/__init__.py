"""The demo's data: pages composed from real scans and photographs, what is asked about them, a tokenizer."""
