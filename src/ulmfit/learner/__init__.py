"""The method from Python, with fastai's verbs; what users need is reached as `ulmfit.NAME`."""
