//! fio on the same file, with the same sizes and depths.

use std::process::Command;

use anyhow::{Context, ensure};

use super::rig::{Kind, Rig};

/// Seconds of one run.
const RUN_SECONDS: &str = "300ms";

/// GiB/s of one run; `None` without fio.
///
/// # Errors
/// When it is there and fails.
pub(super) fn run(rig: &Rig, kind: Kind, depth: usize) -> anyhow::Result<Option<f64>> {
    if Command::new("fio").arg("--version").output().is_err() {
        return Ok(None);
    }
    let (start, bytes) = rig.span();
    let huge = rig.pages().contains("2 MiB");
    let direction = match kind {
        Kind::Read => "randread",
        Kind::Write => "randwrite",
    };
    let output = Command::new("fio")
        .args(["--name=terrace", "--ioengine=io_uring", "--direct=1", "--norandommap", "--time_based"])
        .args(["--fixedbufs=1", "--registerfiles=1", "--output-format=json", "--allow_mounted_write=1"])
        // Reserved pages, where the daemon has huge pages of either kind.
        .arg(if huge { "--mem=mmaphuge" } else { "--mem=mmap" })
        .arg(format!("--filename={}", rig.path().display()))
        .arg(format!("--rw={direction}"))
        .arg(format!("--bs={}", rig.frame_bytes()))
        .arg(format!("--offset={start}"))
        .arg(format!("--size={bytes}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={RUN_SECONDS}"))
        .output()
        .context("fio does not run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "fio failed; with huge pages it needs some free in vm.nr_hugepages: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let json: serde_json::Value =
        serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())
            .context("fio printed no JSON")?;
    let rate = json["jobs"][0][kind.label()]["bw_bytes"].as_f64().context("fio printed no rate")?;
    ensure!(rate > 0.0, "fio moved nothing");
    Ok(Some(rate / super::float(terrace_core::GIB)))
}
