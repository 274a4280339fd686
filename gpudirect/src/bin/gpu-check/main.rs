//! `terrace-gpu-check`: what the device of this machine does with blocks, each
//! figure beside a ceiling of the same run. `tools/gpu-check` calls it after the
//! tests. What cannot be measured is a row with a reason, never a missing row.

mod kernels;
mod links;
mod rows;
mod share;
mod storage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, GIB};
use terrace_gpudirect::{Cuda, Device, DeviceError, HostOnly, log_to};

use rows::Rows;

const USAGE: &str = "terrace-gpu-check [--dir DIR] [--device N] [--host-only] [--json FILE]

  --dir DIR     folder on the drive to be measured (default: the working directory)
  --device N    ordinal of the device (default: 0)
  --host-only   measure the stand-in in host memory instead: shows that the code runs, not what a device does
  --json FILE   write each row as a line of JSON too";

/// Benchmarks stop starting after it, with a reason.
const TIME: Duration = Duration::from_secs(100);

#[derive(Debug)]
struct Options {
    dir: PathBuf,
    ordinal: u32,
    host_only: bool,
    json: Option<PathBuf>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { dir: PathBuf::from("."), ordinal: 0, host_only: false, json: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} wants a value\n{USAGE}"));
        match argument.as_str() {
            "--dir" => options.dir = value()?.into(),
            "--device" => {
                let text = value()?;
                options.ordinal = text.parse().map_err(|_| format!("{text} is no ordinal\n{USAGE}"))?;
            }
            "--host-only" => options.host_only = true,
            "--json" => options.json = Some(value()?.into()),
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    // First of all, while there is one thread.
    let log = log_to(&std::env::temp_dir());
    if std::env::args().nth(1).as_deref() == Some(share::IMPORTER) {
        return share::import_until_killed();
    }
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = log {
        eprintln!("terrace-gpu-check: {error}");
    }
    let mut rows = Rows::default();
    measure(&options, &mut rows);
    rows.print();
    if let Some(path) = &options.json
        && let Err(error) = std::fs::write(path, rows.json())
    {
        eprintln!("terrace-gpu-check: {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    if rows.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn open(options: &Options) -> Result<Arc<dyn Device>, DeviceError> {
    if options.host_only {
        return Ok(Arc::new(HostOnly::new(0, ByteCount::new(2 * GIB))?));
    }
    Ok(Arc::new(Cuda::open(options.ordinal)?))
}

fn measure(options: &Options, rows: &mut Rows) {
    let until = Instant::now() + TIME;
    let device = match open(options) {
        Ok(device) => device,
        Err(error) => {
            rows.note("device", &error.to_string());
            for name in links::NAMES.iter().chain(kernels::NAMES).chain(share::NAMES).chain(storage::NAMES) {
                rows.skip(name, &error.to_string());
            }
            return;
        }
    };
    let info = device.info();
    rows.note("device", &format!("{} ({}, {} bytes)", info.name, info.kind.label(), info.bytes.get()));
    rows.note("driver", &info.driver_version.to_string());
    let links = links::measure(&device, rows, until);
    kernels::measure(options, rows, until, links.map(|links| links.within_device));
    share::measure(&device, rows, until);
    storage::measure(&device, &options.dir, rows, until, links.map(|links| links.to_device));
}
