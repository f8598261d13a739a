def speed(s,r): pass
def training(s,r): pass
