"""What people bring: one file per kind, judged by the library that wrote it."""
