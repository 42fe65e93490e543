"""`python -m fastbert` is the command `fastbert`."""

from fastbert.cli import app

if __name__ == "__main__":
    app(prog_name="fastbert")
