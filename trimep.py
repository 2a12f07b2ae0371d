import ctypes,sys
import ulmfit.training.trainer as T
if sys.argv.pop(1)=='trim':
    libc=ctypes.CDLL(None); old=T.run_training
    def rt(*a,**k):
        try: return old(*a,**k)
        finally: libc.malloc_trim(0)
    T.run_training=rt
exec(open('/root/w/ep.py').read())
