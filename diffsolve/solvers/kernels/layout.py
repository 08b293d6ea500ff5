"""The memory that Python and the compiled kernels share.

A kernel has two arguments: an array of integers (sizes, counters, addresses) and an array of
float64 numbers. The names below are positions in them. Everything that a solve must remember from
one call of a kernel to the next lies there, so that a kernel can return to Python at any step.
"""

from __future__ import annotations

_integers: list[str] = []
_reals: list[str] = []


def _integer(name: str) -> int:
    _integers.append(name)
    return len(_integers) - 1


def _real(name: str) -> int:
    _reals.append(name)
    return len(_reals) - 1


# -- the right-hand side -------------------------------------------------------------------------
N = _integer("N")  # size of the state
FIELD = _integer("FIELD")  # f(t, u, p, out)
PARAMS = _integer("PARAMS")  # the flat parameters that it is given
FUSED = _integer("FUSED")  # a whole step of this method as one function, or 0
N_BREAKS = _integer("N_BREAKS")
BREAKS = _integer("BREAKS")  # float64, increasing

# -- the method ----------------------------------------------------------------------------------
STAGES = _integer("STAGES")  # the derivative at the new point included
EXTRA = _integer("EXTRA")  # stages that only the interpolant needs
DEGREE = _integer("DEGREE")  # of the interpolant
STIFF_STAGE = _integer("STIFF_STAGE")  # the one that the stiffness compares the last with
A = _integer("A")  # float64 (STAGES, STAGES)
C = _integer("C")
B_ERROR = _integer("B_ERROR")  # 0: no estimate
B_LOW = _integer("B_LOW")  # 0: no second estimate
B_DENSE = _integer("B_DENSE")  # of the error of dense output; 0: no such estimate
POLY = _integer("POLY")  # float64 (STAGES + EXTRA, DEGREE), see Interpolant.bernstein
A_EXTRA = _integer("A_EXTRA")  # float64 (EXTRA, STAGES + EXTRA)
C_EXTRA = _integer("C_EXTRA")
ORDER = _integer("ORDER")
STABLE = _integer("STABLE")  # float64: sizes of h lambda that limit the step, or 0
STABLE_MOST_WAIT = _integer("STABLE_MOST_WAIT")
# of implicit methods
GAMMA = _integer("GAMMA")  # float64: the diagonal of the method's matrix
IMPLICIT = _integer("IMPLICIT")  # integers (STAGES): whether a stage is implicit
PREDICTOR = _integer("PREDICTOR")  # float64 (STAGES, STAGES): a stage's first guess
INSIDE = _integer("INSIDE")  # float64 (1 + STAGES, 4): nodes, and weights for those beyond 1
COUPLING = _integer("COUPLING")  # float64 (STAGES, STAGES): sums of stages beside f (Rosenbrock)
TIME_WEIGHTS = _integer("TIME_WEIGHTS")  # float64 (STAGES): of the time derivative (Rosenbrock)
AT_END = _integer("AT_END")  # the stage whose f is that at the new point; 0: none (Rosenbrock)
SMOOTHED = _integer("SMOOTHED")  # whether the error goes through the matrix of the stages

# -- the Jacobian and what is solved with it -----------------------------------------------------
JAC = _integer("JAC")  # jac(t, u, p, out): entries of the Jacobian, then of the time derivative
JAC_ENTRIES = _integer("JAC_ENTRIES")
JAC_ROWS = _integer("JAC_ROWS")  # integers (JAC_ENTRIES)
JAC_COLUMNS = _integer("JAC_COLUMNS")
TIME_TERMS = _integer("TIME_TERMS")  # entries of the time derivative: N, or 0 where it is zero
N_COLUMNS = _integer("N_COLUMNS")  # the Jacobian has no others: the rest are integrals
JVP = _integer("JVP")  # jvp(t, u, p, v, out)
JAC_VJP = _integer("JAC_VJP")  # cotangents of what JAC gives, added to those of u and p
JAC_VALUES = _integer("JAC_VALUES")  # what JAC gave; then the stiffness, if STEP_FUSED
JAC_BAR = _integer("JAC_BAR")
MATRIX = _integer("MATRIX")  # float64 (N_COLUMNS, N_COLUMNS), factored
PIVOTS = _integer("PIVOTS")  # integers (N_COLUMNS)
VECTOR = _integer("VECTOR")  # float64 (N): to solve in
HAS_JAC = _integer("HAS_JAC")
FRESH = _integer("FRESH")  # whether it is the Jacobian at the start of the step
STALE = _integer("STALE")  # whether Newton was slow with it
FACTORED = _integer("FACTORED")
TO_ROUNDING = _integer("TO_ROUNDING")  # whether Newton goes on until nothing but rounding is left
STEP_FUSED = _integer("STEP_FUSED")  # whether one function took the whole step at hand
FORGOT = _integer("FORGOT")  # whether the step at hand began without what Newton learnt before
NJAC = _integer("NJAC")
NLU = _integer("NLU")
NSOLVE = _integer("NSOLVE")
NNEWTON = _integer("NNEWTON")

# -- the error and the step size -----------------------------------------------------------------
RTOL = _integer("RTOL")  # float64, RTOL_STRIDE 0: one number for all
RTOL_STRIDE = _integer("RTOL_STRIDE")
ATOL = _integer("ATOL")
ATOL_STRIDE = _integer("ATOL_STRIDE")
N_BLOCKS = _integer("N_BLOCKS")  # the norm is the largest of the blocks' norms
BLOCK_ENDS = _integer("BLOCK_ENDS")
CONTROLLER = _integer("CONTROLLER")  # INTEGRAL, PI or PID
HAS_MEMORY = _integer("HAS_MEMORY")
ADAPTIVE = _integer("ADAPTIVE")
MAXITERS = _integer("MAXITERS")

# -- where it must land, and what it saves -------------------------------------------------------
N_STOPS = _integer("N_STOPS")
STOPS = _integer("STOPS")  # float64, the end of the span is the last
STOP = _integer("STOP")
N_SAVES = _integer("N_SAVES")  # -1: every step
SAVES = _integer("SAVES")
SAVED = _integer("SAVED")
SAVE_ROOM = _integer("SAVE_ROOM")  # rows of OUT_U
OUT_U = _integer("OUT_U")
OUT_STRIDE = _integer("OUT_STRIDE")  # numbers from one row of it to the next

# -- what it records of its steps ----------------------------------------------------------------
STEP_ROOM = _integer("STEP_ROOM")
ACCEPTED = _integer("ACCEPTED")
STEP_T = _integer("STEP_T")  # float64
STEP_H = _integer("STEP_H")
ERROR = _integer("ERROR")
ERROR_NORM = _integer("ERROR_NORM")
STIFFNESS = _integer("STIFFNESS")
MARKS = _integer("MARKS")  # integers (STEP_ROOM, N_MARKS): see below; 0: not wanted
STATES = _integer("STATES")  # (STATE_ROOM, STATE_SIZE), the record of each STRIDE-th step
STATE_SIZE = _integer("STATE_SIZE")  # numbers in a record: the state, and what a family adds
STATE_ROOM = _integer("STATE_ROOM")
STRIDE = _integer("STRIDE")  # 0: no states
THINNING = _integer("THINNING")  # whether to drop every second state when there is no room
DENSE = _integer("DENSE")  # (STEP_ROOM, DENSE_ROWS, N): u and the stages; 0: none
COMPLETE = _integer("COMPLETE")  # integers (STEP_ROOM): whether the extra stages are there
ALWAYS_COMPLETE = _integer("ALWAYS_COMPLETE")

# -- a reverse solve of an adjoint equation ------------------------------------------------------
JUMPS = _integer("JUMPS")  # integers (N_STOPS): row of BARS to add to the state there, or -1
BARS = _integer("BARS")  # (rows, PRIMAL_N)
PRIMAL_N = _integer("PRIMAL_N")
FORWARD_RTOL = _integer("FORWARD_RTOL")  # float64, to judge a reconstructed state by
FORWARD_RTOL_STRIDE = _integer("FORWARD_RTOL_STRIDE")
FORWARD_ATOL = _integer("FORWARD_ATOL")
FORWARD_ATOL_STRIDE = _integer("FORWARD_ATOL_STRIDE")
RESET = _integer("RESET")  # rows of the primal state to set it to at each jump, or 0
PATH = _integer("PATH")  # dense records of the forward solve, or 0
PATH_STEPS = _integer("PATH_STEPS")
PATH_T = _integer("PATH_T")
PATH_H = _integer("PATH_H")
PATH_ROWS = _integer("PATH_ROWS")  # stages and extra stages
PATH_STRIDE = _integer("PATH_STRIDE")  # rows of a record
PATH_DEGREE = _integer("PATH_DEGREE")
PATH_POLY = _integer("PATH_POLY")
PATH_OUT = _integer("PATH_OUT")  # behind the parameters: the primal state and its slope

# -- the loop ------------------------------------------------------------------------------------
START = _integer("START")  # the state to begin with
WORK = _integer("WORK")
CHUNK = _integer("CHUNK")  # attempted steps before it returns to Python
BEGUN = _integer("BEGUN")
NF = _integer("NF")
ATTEMPTS = _integer("ATTEMPTS")
REJECTED = _integer("REJECTED")
REJECTIONS = _integer("REJECTIONS")  # in a row
FAILURE = _integer("FAILURE")  # why the last attempt failed, other than by its error
RESTARTED = _integer("RESTARTED")
SINCE = _integer("SINCE")

# -- the reverse sweep of the discrete adjoint ---------------------------------------------------
VJP = _integer("VJP")  # vjp(t, u, p, w, u_bar, p_bar): u_bar is written, p_bar added to
FUSED_VJP = _integer("FUSED_VJP")
P_BAR = _integer("P_BAR")
STATE_BAR = _integer("STATE_BAR")  # (2, N): cotangents of u and du after the step at hand
SAVED_BARS = _integer("SAVED_BARS")  # (saves, N), or 0
ERROR_BARS = _integer("ERROR_BARS")  # (steps), or 0
ERROR_NORM_BARS = _integer("ERROR_NORM_BARS")
STIFFNESS_BARS = _integer("STIFFNESS_BARS")
SEGMENT = _integer("SEGMENT")  # the states of steps that are taken again
NOT_REPEATED = _integer("NOT_REPEATED")  # whether a step could not be taken again
STEPS_LEFT = _integer("STEPS_LEFT")  # the sweep has come back to the end of this many steps
SWEEP_FROM = _integer("SWEEP_FROM")  # it began at this step, and ends at RUN_BEGIN
REPLAY_FROM = _integer("REPLAY_FROM")  # first of CHUNK steps that are taken again

# -- switching between two methods ---------------------------------------------------------------
SWITCH = _integer("SWITCH")  # 0: no; NONSTIFF or STIFF: which of them is at work
SWITCH_COUNT = _integer("SWITCH_COUNT")  # steps in a row that ask for the other
SWITCH_AFTER = _integer("SWITCH_AFTER")  # so many of them make the kernel hand over
HANDED_OVER = _integer("HANDED_OVER")  # how a state was taken from the other method; 0: it was not
RUN_BEGIN = _integer("RUN_BEGIN")  # first step of the method at work
RUN_STATE = _integer("RUN_STATE")  # the state that it began with
DENSE_ROWS = _integer("DENSE_ROWS")  # rows of a record of DENSE

# -- steps that are stable for every mode --------------------------------------------------------
STABLE_WAIT = _integer("STABLE_WAIT")  # accepted steps from look to look; 0: begin anew
STABLE_LAST_WAIT = _integer("STABLE_LAST_WAIT")  # the wait before that, 1 if the limit changed then
STABLE_AGE = _integer("STABLE_AGE")  # accepted steps since the last look
STABLE_SURE = _integer("STABLE_SURE")  # whether the last look was for a step near the limit
STABLE_FOLLOWS = _integer("STABLE_FOLLOWS")  # whether W_MODE is a direction to go on with

# -- the times at which a solution is read -------------------------------------------------------
N_READ = _integer("N_READ")
READ = _integer("READ")
DERIVATIVE = _integer("DERIVATIVE")
READ_OUT = _integer("READ_OUT")

# -- the noise of an SDE, whose state is ROWS paths ----------------------------------------------
NG = _integer("NG")
DRIFTS = _integer("DRIFTS")  # evaluations of f and g in a step
DIFFUSIONS = _integer("DIFFUSIONS")
DIFFUSION = _integer("DIFFUSION")  # g(t, u, p, out)
DIFFUSION_SIZE = _integer("DIFFUSION_SIZE")  # numbers that it writes
DIFFUSION_VJP = _integer("DIFFUSION_VJP")
SUMS = _integer("SUMS")  # (4), what a step adds up over all entries
NOISE_SIZE = _integer("NOISE_SIZE")  # Brownian motions of all paths
NOISE = _integer("NOISE")  # (2, NOISE_SIZE), W and H of the step at hand; 0: no SDE
AREA = _integer("AREA")  # whether steps need H
DRAW = _integer("DRAW")  # the kernel that draws normals, and what it is called with
DRAW_WITH = _integer("DRAW_WITH")
AHEAD = _integer("AHEAD")  # float64 (2, AHEAD_COUNT, NOISE_SIZE): normals of the serials from ...
AHEAD_COUNT = _integer("AHEAD_COUNT")
AHEAD_FIRST = _integer("AHEAD_FIRST")  # ... this one on
SERIAL = _integer("SERIAL")  # of the next draw
SPARE_NORMALS = _integer("SPARE_NORMALS")  # float64 (2, NOISE_SIZE)
REMEMBERS = _integer("REMEMBERS")  # whether noise of rejected steps is used again
KNOWN = _integer("KNOWN")  # intervals that are known from the time at hand on
KNOWN_ROOM = _integer("KNOWN_ROOM")
KNOWN_END = _integer("KNOWN_END")  # float64 (KNOWN_ROOM), in the order of the steps
KNOWN_PIECE = _integer("KNOWN_PIECE")  # integers (KNOWN_ROOM), as BrownianPath.pieces has them
KNOWN_PLACE = _integer("KNOWN_PLACE")  # integers (KNOWN_ROOM): row of KNOWN_VALUES; then free ones
KNOWN_VALUES = _integer("KNOWN_VALUES")  # float64 (KNOWN_ROOM, 2, NOISE_SIZE)
LOG = _integer("LOG")  # integers (LOG_ROOM, 2): parent and counter of each draw ...
LOG_TIMES = _integer("LOG_TIMES")  # ... float64 (LOG_ROOM, 3): left, middle and right
LOGGED = _integer("LOGGED")
LOG_ROOM = _integer("LOG_ROOM")
DIVISIONS = _integer("DIVISIONS")  # how many of them divided an interval
READING = _integer("READING")  # the step within which the path is read
READ_SUM = _integer("READ_SUM")  # float64 (NOISE_SIZE): W from its start to the last read
READ_NOISE = _integer("READ_NOISE")  # (NOISE_SIZE): W there less that of a straight line
G_ROW = _integer("G_ROW")  # (2, DIFFUSION_SIZE): g, and its cotangent
SAVE_NOISE = _integer("SAVE_NOISE")  # (saves, NOISE_SIZE): READ_NOISE of each; 0: not kept
SUMS_BAR = _integer("SUMS_BAR")  # (2)
STEP_SUMS = _integer("STEP_SUMS")  # float64 (STEP_ROOM, 4), of each step; see measure
N_ALL = _integer("N_ALL")  # size of the state with the paths of all threads
BAR = _integer("BAR")  # (N): where the cotangent of a step's start goes
AT_STATE = _integer("AT_STATE")  # the state before the step at hand of the reverse pass ...
AT_NOISE = _integer("AT_NOISE")  # ... and its noise, as NOISE

T = _real("T")
T_END = _real("T_END")  # where STOPS points to if there are no others
SIZE = _real("SIZE")  # of the next step; NaN: to be guessed
DIRECTION = _real("DIRECTION")
DT = _real("DT")
DTMIN = _real("DTMIN")
DTMAX = _real("DTMAX")
ANCHOR = _real("ANCHOR")  # the last stop
SAFETY = _real("SAFETY")
FACTOR_MIN = _real("FACTOR_MIN")
FACTOR_MAX = _real("FACTOR_MAX")
STEADY = _real("STEADY")
BETA1 = _real("BETA1")
BETA2 = _real("BETA2")
BETA3 = _real("BETA3")
BETA_PLAIN = _real("BETA_PLAIN")  # PID: exponent of integral control, for rejected steps
MEMORY1 = _real("MEMORY1")  # logarithms of errors
MEMORY2 = _real("MEMORY2")
LAST_H = _real("LAST_H")
LAST_ERROR = _real("LAST_ERROR")
LAST_STIFFNESS = _real("LAST_STIFFNESS")
WORST = _real("WORST")  # distance of a reconstructed state from the true one, in tolerances
T_LOW = _real("T_LOW")  # the span of the forward solve
T_HIGH = _real("T_HIGH")
WINDOW_LOW = _real("WINDOW_LOW")  # the part of it that PATH holds
WINDOW_HIGH = _real("WINDOW_HIGH")
PATH_END = _real("PATH_END")
FACTORED_H = _real("FACTORED_H")  # step size in MATRIX
KAPPA = _real("KAPPA")  # what Newton may leave: in tolerances, or in units of rounding
STIFF_ABOVE = _real("STIFF_ABOVE")  # step size times stiffness that asks for the stiff method
STABLE_SIZE = _real("STABLE_SIZE")  # the limit of the step size
STABLE_SEEN = _real("STABLE_SEEN")  # size of the step at the last look
STABLE_RATE = _real("STABLE_RATE")  # magnitude of the eigenvalue that it comes from
RELATIVE_STIFFNESS = _real("RELATIVE_STIFFNESS")  # the estimate that is judged by
NOISE_START = _real("NOISE_START")  # first point of the Brownian path
KNOWN_FROM = _real("KNOWN_FROM")  # where the known intervals begin
NOISE_END = _real("NOISE_END")  # last point that was drawn

N_INTEGERS = len(_integers)
N_REALS = len(_reals)

#: In LOG: an interval that was drawn afresh has no parent.
FRESH_INTERVAL = 1 << 62

# columns of MARKS
MARK_RESTART = 0
MARK_FIRST_SAVE = 1
MARK_INSIDE = 2  # saves strictly inside the step
MARK_END_SAVE = 3  # the save at its end, or -1
MARK_FORGOT = 4  # as FORGOT
MARK_FUSED = 5  # as STEP_FUSED
N_MARKS = 6

# kinds of controllers
INTEGRAL = 0
PI = 1
PID = 2

# what a kernel returns
DONE = 0
GO_ON = 1  # nothing is wrong: call it again
NEED_ROOM = 2
NEED_PATH = 3
MAX_ITERS = 4
DT_LESS_THAN_MIN = 5
UNSTABLE = 6
NEWTON_FAILED = 7
SWITCHED = 8

# why an attempt failed
NOT_FINITE = 1
NOT_CONVERGED = 2
SINGULAR = 3
JAC_NOT_FINITE = 4

# how a state is handed over from one of two methods to the other
WITH_DERIVATIVE = 1
WITHOUT_DERIVATIVE = 2  # which the other one then evaluates

# which method of two is at work
NONSTIFF = 1
STIFF = 2

# rows of N numbers at the start of WORK; the stages follow
W_U = 0
W_DU = 1
W_NEW = 2
W_STIFF = 3
W_ERROR = 4
W_LOW = 5
W_TEMP = 6
W_MODE = 7  # kept from step to step
W_BASE = 8  # right before the stages
W_STAGES = 9
# and behind the stages, their times and their cotangents, the rows of the reverse sweep
W_BARS = 6
