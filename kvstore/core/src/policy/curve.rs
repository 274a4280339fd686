//! What other sizes of a tier would bring.
