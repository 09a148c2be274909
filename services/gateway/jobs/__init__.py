"""Jobs: requests whose answers are fetched later (docs/jobs.md, ADR 0018)."""
