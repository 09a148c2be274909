"""Jobs: requests whose answers are fetched later (docs/jobs.md, ADR 0018, ADR 0028)."""
