//! The sources compile for the devices that we know, and the PTX that we carry is theirs.

use std::path::PathBuf;

use terrace_gpudirect::kernels::{Kernel, KernelError, Nvrtc, OnHost, Source, Target};

/// The compiler that the PTX was made with; `tools/dev/kernels fetch` installs it.
fn nvrtc() -> Option<Nvrtc> {
    let found = std::env::var_os("TERRACE_NVRTC").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("TERRACE_CACHE").map(PathBuf::from);
        let cache =
            cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/terrace")))?;
        Some(cache.join("nvrtc-13.0.88/libnvrtc.so.13")).filter(|path| path.is_file())
    });
    let Some(path) = found else {
        eprintln!("SKIPPED: NVRTC 13.0.88 is not installed; `tools/dev/kernels fetch` does it (90 MB)");
        return None;
    };
    Some(Nvrtc::open_at(&path).unwrap())
}

/// PTX that was not made anew after a change would run old kernels on machines without NVRTC: make it, and compare.
#[test]
fn carried_ptx_is_that_of_the_sources() {
    let Some(nvrtc) = nvrtc() else { return };
    assert_eq!(nvrtc.version(), (13, 0));
    for source in Source::ALL {
        let made = nvrtc.compile(source, Target::Ptx { capability: 90 }).unwrap();
        let text = String::from_utf8(made.image).unwrap();
        if std::env::var_os("TERRACE_WRITE_PTX").is_some() {
            let path = format!("{}/kernels/ptx/{}.ptx", env!("CARGO_MANIFEST_DIR"), source.name());
            std::fs::write(path, text.trim_end_matches('\0')).unwrap();
            continue;
        }
        assert!(
            text.trim_end_matches('\0') == source.ptx(),
            "{}.ptx is not that of its source; run tools/dev/kernels ptx",
            source.name()
        );
    }
}

/// A kernel that spills registers to memory is slow, and nothing says so: machine code must come without, for the
/// devices of today.
#[test]
fn no_kernel_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    for capability in [80, 90, 100] {
        for source in Source::ALL {
            let log = nvrtc.compile(source, Target::Machine { capability }).unwrap().log;
            let spills: Vec<&str> = log.lines().filter(|line| line.contains("spill stores")).collect();
            let kernels = Kernel::ALL.iter().filter(|kernel| kernel.source() == source).count();
            assert!(spills.len() >= kernels, "{kernels} kernels of {} in {log}", source.name());
            for line in spills {
                assert!(
                    line.contains(" 0 bytes spill stores, 0 bytes spill loads"),
                    "sm_{capability}: {log}"
                );
            }
        }
    }
}

/// The driver takes PTX up to its own version, and fuses products and sums unless each says how it rounds: the engine's
/// bits depend on it.
#[test]
fn carried_ptx_is_for_the_driver_and_rounds_each_step() {
    for source in Source::ALL {
        let text = source.ptx();
        assert!(text.contains(".version 9.0\n"), "CUDA 13.0 takes PTX 9.0");
        assert!(text.contains(".target sm_90\n"));
        for kernel in Kernel::ALL.iter().filter(|kernel| kernel.source() == source) {
            assert!(text.contains(&format!(".visible .entry {}(", kernel.name())), "{}", kernel.name());
        }
        for loose in ["mul.f32", "add.f32", "sub.f32", "mul.ftz", "add.ftz", ".approx", "div.full"] {
            assert!(!text.contains(loose), "{loose} in {}", source.name());
        }
    }
}

/// What the compiler refuses must come back in its own words, and a library that is none must be an error.
#[test]
fn refusals_say_why() {
    let missing = Nvrtc::open_at(std::path::Path::new("/nowhere/libnvrtc.so"));
    assert!(matches!(missing, Err(KernelError::NoNvrtc { .. })), "{missing:?}");
    let Some(nvrtc) = nvrtc() else { return };
    let text = "#include \"common.cuh\"\nextern \"C\" __global__ void broken() { undeclared = 1; }\n";
    let refused = nvrtc.compile_text("broken", text, Target::Ptx { capability: 90 });
    let Err(KernelError::Refused { log, .. }) = refused else { panic!("{refused:?}") };
    assert!(log.contains("broken.cu(2)") && log.contains("undeclared"), "{log}");
}

/// The build for the host is what makes the other tests say something: it must be there where CI runs.
#[test]
fn the_host_builds_the_kernels() {
    if let Err(error) = OnHost::build() {
        assert!(matches!(error, KernelError::NoCompiler { .. }), "{error}");
        assert!(std::env::var_os("CI").is_none(), "CI has a C++ compiler: {error}");
        eprintln!("SKIPPED: {error}");
    }
}
