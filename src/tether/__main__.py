"""`python -m tether`: the command line, on the backend that Keras is set to."""

from tether_cli import main

if __name__ == "__main__":
    main()
