"""The OpenAI API over HTTP: what may be asked, and in which shape answers and errors come."""
