"""`python -m modes_fx` is `modes-fx`; torchrun starts it as `torchrun ... -m modes_fx calibrate ...`."""

from modes_fx.cli import main

if __name__ == "__main__":
    main()
