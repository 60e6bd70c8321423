"""Results shown: tables, figures, pages."""
