//! The other tests again, over a driver that is built for it: what the CUDA queue
//! calls, with which arguments, in which order. On a machine with a GPU the other
//! tests go to the real driver anyway.

use std::path::Path;
use std::process::Command;

use terrace_gpudirect::kernels::{Cuda, KernelError, KernelQueue};

const PART: &str = "TERRACE_TEST_KERNEL_DRIVER";

/// Functions of the suite's stand-in that its memory is too particular for, by those in `driver.cc`.
const OURS: [(&str, &str); 5] = [
    ("cuMemcpyHtoDAsync_v2", "kernels_copy_in"),
    ("cuMemcpyDtoHAsync_v2", "kernels_copy_out"),
    ("cuMemsetD8Async", "kernels_set"),
    ("cuStreamSynchronize", "kernels_stream_synchronize"),
    ("cuStreamDestroy_v2", "kernels_stream_destroy"),
];

/// Builds the driver in a folder. False where there is no compiler.
fn build(folder: &Path, kernels: bool) -> bool {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let (plain, object) = (folder.join("cuda.o"), folder.join("driver.o"));
    let mut first = Command::new("cc");
    first.args(["-O1", "-fPIC", "-c", "-o"]).arg(&plain).arg(tests.join("suite/fake/cuda.c"));
    let mut last = Command::new("c++");
    last.args(["-shared", "-o"]).arg(folder.join("libcuda.so")).arg(&plain);
    let mut commands = Vec::new();
    if kernels {
        let mut second = Command::new("c++");
        second.args(["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-w", "-c", "-o"]);
        second.arg(&object).arg(tests.join("kernels/driver.cc"));
        for (theirs, ours) in OURS {
            first.arg(format!("-D{theirs}=suite_{theirs}"));
            second.arg(format!("-D{ours}={theirs}"));
        }
        last.arg(&object);
        commands.push(second);
    }
    last.arg("-lpthread");
    commands.insert(0, first);
    commands.push(last);
    for mut command in commands {
        match command.output() {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            Err(error) => {
                eprintln!("SKIPPED over a driver: {error}");
                return false;
            }
        }
    }
    true
}

/// This program again over a driver, to run the named tests; what it said.
fn again(name: &str, kernels: bool, tests: &[&str]) -> Option<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let built = build(&folder, kernels);
    let output = built.then(|| {
        Command::new(std::env::current_exe().unwrap())
            .args(tests)
            .args(["--nocapture", "--test-threads=1"])
            .env("LD_LIBRARY_PATH", &folder)
            .env("TERRACE_NVRTC", "/nowhere/libnvrtc.so")
            .env(PART, name)
            .output()
            .unwrap()
    });
    std::fs::remove_dir_all(&folder).unwrap();
    let output = output?;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}\n{said}", output.status);
    Some(said)
}

/// Which stand-in this process runs over.
pub(crate) fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// Memory that is kept for the next allocation must come back as zeros, whatever it held.
#[test]
fn taken_memory_is_zero() {
    for queue in crate::queues() {
        for bytes in [1, 256, 5000, 1 << 20] {
            for _ in 0..3 {
                let memory = queue.allocate(bytes).unwrap();
                let mut found = vec![1; bytes];
                queue.read(&memory, &mut found).unwrap();
                assert!(found.iter().all(|byte| *byte == 0), "{bytes} bytes on {}", queue.describe());
                queue.write(&memory, &vec![0xFF; bytes]).unwrap();
            }
        }
    }
}

/// A wrong order of arguments, a freed table or a grid that a driver refuses would show on a GPU only: run the other
/// tests over a driver that checks and runs the kernels.
#[test]
fn the_other_tests_run_over_a_driver() {
    if part().is_some() {
        return;
    }
    let tests = ["moves::", "sums::", "taken_memory"];
    let Some(said) = again("driver-with-kernels", true, &tests) else { return };
    let name = "runs on: cuda:0 (fake device), kernels from the PTX inside (NVRTC cannot be used";
    assert!(said.contains(name), "{said}");
    assert!(!said.contains("SKIPPED on a device"), "{said}");
}

/// A driver that lacks what kernels need makes the bindings panic: it must be an error that says what is missing.
#[test]
fn an_old_driver_is_refused() {
    match part().as_deref() {
        None => {
            let Some(said) = again("driver-without-kernels", false, &["an_old_driver"]) else { return };
            assert!(said.contains("refused: "), "{said}");
        }
        Some("driver-without-kernels") => {
            let refused = Cuda::open(0).map(|queue| queue.describe());
            let Err(KernelError::Device(error)) = refused else { panic!("{refused:?}") };
            assert!(error.to_string().starts_with("the CUDA driver offers no cu"), "{error}");
            eprintln!("refused: {error}");
        }
        Some(_) => {}
    }
}
