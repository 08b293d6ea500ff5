"""The equations of the stiff problems, once for all peers and for the references.

``equations(u, p)`` returns the derivatives as a list. It uses only ``+ - * /`` and integers, so the
components may be numbers of any kind: floats, decimals, expressions, or arrays of them.
"""

from __future__ import annotations

from typing import Any


def rober_equations(u: Any, p: Any) -> list:
    slow, fast, back = p[0] * u[0], p[1] * u[1] * u[1], p[2] * u[1] * u[2]
    return [back - slow, slow - back - fast, fast]


def orego_equations(u: Any, p: Any) -> list:
    x, y, z = u
    s, w, q = p
    return [s * (y + x * (1 - q * x - y)), (z - (1 + x) * y) / s, w * (x - z)]


def hires_equations(u: Any, p: Any) -> list:
    y1, y2, y3, y4, y5, y6, y7, y8 = u
    k1, k2, k3, k4, k5, k6, binding, release, loss, supply = p
    meet = binding * y6 * y8
    bound = meet - (k2 + release + loss) * y7
    return [
        k2 * y2 + k6 * y3 + supply - k1 * y1,
        k1 * y1 - (k2 + k3) * y2,
        k2 * y4 + k5 * y5 - (k6 + k1) * y3,
        k3 * y2 + k1 * y3 - (k4 + k2) * y4,
        k2 * (y6 + y7) - (k5 + k1) * y5,
        k4 * y4 + k1 * y5 + release * y7 - k2 * y6 - meet,
        bound,
        -bound,
    ]


def van_der_pol_equations(u: Any, p: Any) -> list:
    return [u[1], p[0] * (1 - u[0] * u[0]) * u[1] - u[0]]


def pollu_equations(u: Any, p: Any) -> list:
    no2, no, o3p, o3, ho2, oh, hcho, _, ald, meo2, c2o3, _, pan, ch3o, _, o1d, so2, _, no3, n2o5 = u
    r = [
        *(p[0] * no2, p[1] * no * o3, p[2] * ho2 * no, p[3] * hcho, p[4] * hcho),
        *(p[5] * hcho * oh, p[6] * ald, p[7] * ald * oh, p[8] * c2o3 * no, p[9] * c2o3 * no2),
        *(p[10] * pan, p[11] * meo2 * no, p[12] * ch3o, p[13] * no2 * oh, p[14] * o3p),
        *(p[15] * o3, p[16] * o3, p[17] * o1d, p[18] * o1d, p[19] * so2 * oh),
        *(p[20] * no3, p[21] * no3, p[22] * no2 * o3, p[23] * no3 * no2, p[24] * n2o5),
    ]
    r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15, r16, r17, r18, *rest = r
    r19, r20, r21, r22, r23, r24, r25 = rest
    return [
        r2 + r3 + r9 + r11 + r12 + r22 + r25 - r1 - r10 - r14 - r23 - r24,
        r1 + r21 - r2 - r3 - r9 - r12,
        r1 + r17 + r19 + r22 - r15,
        r15 - r2 - r16 - r17 - r23,
        2 * r4 + r6 + r7 + r13 + r20 - r3,
        r3 + 2 * r18 - r6 - r8 - r14 - r20,
        r13 - r4 - r5 - r6,
        r4 + r5 + r6 + r7,
        -r7 - r8,
        r7 + r9 - r12,
        r8 + r11 - r9 - r10,
        r9,
        r10 - r11,
        r12 - r13,
        r14,
        r16 - r18 - r19,
        -r20,
        r20,
        r23 + r25 - r21 - r22 - r24,
        r24 - r25,
    ]
