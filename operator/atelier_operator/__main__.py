"""`python -m atelier_operator`: the operator."""

from atelier_operator.main import main

main()
