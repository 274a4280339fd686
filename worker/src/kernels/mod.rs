//! Arithmetic of the engine, one source for every instruction set.
//!
//! A kernel is written once over [`lanes::Lanes`], sixteen f32 values, and
//! compiled for AVX-512, for AVX2 and for plain Rust. All three use the same
//! correctly rounded operations in the same order, and every output element is
//! summed in one order that depends neither on the batch nor on the threads.
//! So the bits of a block say nothing about who computed it, and a block from
//! one machine continues on another. What is left to others: threads (the
//! model splits work into tasks that own their output), and the order of layers.

pub(crate) mod attention;
pub(crate) mod device;
pub(crate) mod elementwise;
pub(crate) mod gemm;
pub(crate) mod lanes;
pub(crate) mod leased;
pub mod memory;

/// An instruction set that this processor has been seen to have.
///
/// Values come from [`Isa::detect`] and [`Isa::available`] only, so holding one
/// proves that its instructions may be executed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The fastest one.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// All that can run here, fastest first. The last is always plain Rust.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") {
                found.push(Self(Kind::Avx512));
            }
            if avx2 {
                found.push(Self(Kind::Avx2));
            }
        }
        found.push(Self(Kind::Portable));
        found
    }

    /// A word for logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

/// Defines `fn $name(isa, args...)`, which runs `$body::<V>(args...)` compiled
/// for the lanes of that instruction set. `$body` must be an `unsafe fn` marked
/// `#[inline(always)]` whose only requirement on its caller, beside those that
/// the safe wrapper checks, is that the instructions exist.
macro_rules! multiversion {
    ($(#[$meta:meta])* unsafe fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        unsafe fn $name(isa: $crate::kernels::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: the features are enabled on this very function; the
                // rest is the caller's promise, passed through.
                unsafe { $body::<$crate::kernels::lanes::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { $body::<$crate::kernels::lanes::Avx2>($($arg),*) }
            }
            match isa.kind() {
                // SAFETY: an `Isa` of this kind exists only where detection found
                // the instructions; the rest is the caller's promise.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::Kind::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: portable lanes need no instructions; the rest is the
                // caller's promise.
                $crate::kernels::Kind::Portable => unsafe {
                    $body::<$crate::kernels::lanes::Portable>($($arg),*)
                },
            }
        }
    };
}
pub(crate) use multiversion;
