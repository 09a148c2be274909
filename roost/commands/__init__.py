"""One file per group of commands; each adds its parser and does its work through the client."""
