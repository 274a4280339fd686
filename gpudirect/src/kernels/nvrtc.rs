//! NVRTC, loaded at run time: the compiler of kernels, where it is installed.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

use libloading::Library;

use super::{COMMON, KernelError, Source};

const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
// Products and sums stay apart (the engine's sums have one order and one rounding), and ptxas says how
// many registers it spilled.
const COMMON_OPTIONS: [&CStr; 2] = [c"--fmad=false", c"--std=c++17"];

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The library and what we call of it.
#[derive(Debug)]
pub struct Nvrtc {
    create: Create,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: Compile,
    log_size: Size,
    log: Text,
    ptx_size: Size,
    ptx: Text,
    cubin_size: Size,
    cubin: Text,
    version: (i32, i32),
    // What all of the above point into, and what NVRTC looks for when it compiles.
    _library: Library,
    _builtins: Option<Library>,
}

/// What to compile for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// PTX for a compute capability and all later ones, which the driver compiles once more.
    Ptx {
        /// 90 for 9.0.
        capability: u32,
    },
    /// Machine code for one compute capability.
    Machine {
        /// 90 for 9.0.
        capability: u32,
    },
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// PTX with a zero behind it, or machine code.
    pub image: Vec<u8>,
    /// What the compiler said; for machine code also the registers of each kernel.
    pub log: String,
}

impl Nvrtc {
    /// Loads the library: `$TERRACE_NVRTC` if that is set, else by its usual names.
    ///
    /// # Errors
    /// [`KernelError::NoNvrtc`].
    pub fn open() -> Result<Self, KernelError> {
        if let Some(path) = std::env::var_os("TERRACE_NVRTC") {
            return Self::open_at(Path::new(&path));
        }
        let mut last = String::new();
        for name in NAMES {
            match Self::open_at(Path::new(name)) {
                Ok(nvrtc) => return Ok(nvrtc),
                Err(error) => last = error.to_string(),
            }
        }
        Err(KernelError::NoNvrtc { detail: last })
    }

    /// Loads a library by its path.
    ///
    /// # Errors
    /// [`KernelError::NoNvrtc`].
    pub fn open_at(path: &Path) -> Result<Self, KernelError> {
        let lacking = |error: libloading::Error| KernelError::NoNvrtc { detail: error.to_string() };
        let builtins = builtins_beside(path);
        // SAFETY: NVRTC's initialisers have no demands; the name is NVRTC's own.
        let library = unsafe { Library::new(path) }.map_err(lacking)?;
        // SAFETY: the types are those of nvrtc.h, which have not changed since CUDA 11.1. The pointers are
        // kept no longer than the library.
        unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
                *library.get(b"nvrtcVersion\0").map_err(lacking)?;
            let (mut major, mut minor) = (0, 0);
            if version(&raw mut major, &raw mut minor) != 0 {
                return Err(KernelError::NoNvrtc { detail: "it does not know its version".to_owned() });
            }
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram\0").map_err(lacking)?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").map_err(lacking)?,
                compile: *library.get(b"nvrtcCompileProgram\0").map_err(lacking)?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0").map_err(lacking)?,
                log: *library.get(b"nvrtcGetProgramLog\0").map_err(lacking)?,
                ptx_size: *library.get(b"nvrtcGetPTXSize\0").map_err(lacking)?,
                ptx: *library.get(b"nvrtcGetPTX\0").map_err(lacking)?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0").map_err(lacking)?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").map_err(lacking)?,
                version: (major, minor),
                _library: library,
                _builtins: builtins,
            })
        }
    }

    /// Major and minor number of the toolkit that it is from.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles one of our sources.
    ///
    /// # Errors
    /// [`KernelError::Refused`] with the compiler's words.
    pub fn compile(&self, source: Source, target: Target) -> Result<Compiled, KernelError> {
        self.compile_text(source.name(), source.text(), target)
    }

    /// Compiles a text that may include `common.cuh`.
    ///
    /// # Errors
    /// [`KernelError::Refused`] with the compiler's words.
    pub fn compile_text(&self, name: &str, text: &str, target: Target) -> Result<Compiled, KernelError> {
        let refused = |log: String| KernelError::Refused { what: name.to_owned(), log };
        let zeroless = |text: &str| CString::new(text).map_err(|error| refused(error.to_string()));
        let (file, text, common) = (zeroless(&format!("{name}.cu"))?, zeroless(text)?, zeroless(COMMON)?);
        let option = match target {
            Target::Ptx { capability } => format!("--gpu-architecture=compute_{capability}"),
            Target::Machine { capability } => format!("--gpu-architecture=sm_{capability}"),
        };
        let option = zeroless(&option)?;
        let mut options: Vec<*const c_char> = vec![option.as_ptr()];
        options.extend(COMMON_OPTIONS.map(CStr::as_ptr));
        if matches!(target, Target::Machine { .. }) {
            options.push(c"--ptxas-options=-v".as_ptr());
        }
        let (headers, names) = ([common.as_ptr()], [c"common.cuh".as_ptr()]);
        let mut program = ptr::null_mut();
        // SAFETY: all texts end in a zero and live until the call returns; the arrays have one entry.
        let made = unsafe {
            (self.create)(&raw mut program, text.as_ptr(), file.as_ptr(), 1, headers.as_ptr(), names.as_ptr())
        };
        if made != 0 {
            return Err(refused(format!("NVRTC makes no program of it ({made})")));
        }
        let _destroyed = Destroyed { nvrtc: self, program };
        let count = c_int::try_from(options.len()).map_err(|error| refused(error.to_string()))?;
        // SAFETY: the program was made above; the options end in zeros and outlive the call.
        let answer = unsafe { (self.compile)(program, count, options.as_ptr()) };
        let log = String::from_utf8_lossy(&fetch(program, self.log_size, self.log).unwrap_or_default())
            .trim_end_matches('\0')
            .to_owned();
        if answer != 0 {
            return Err(refused(log));
        }
        let image = match target {
            Target::Ptx { .. } => fetch(program, self.ptx_size, self.ptx),
            Target::Machine { .. } => fetch(program, self.cubin_size, self.cubin),
        };
        image.map(|image| Compiled { image, log }).ok_or_else(|| refused("it gives nothing out".to_owned()))
    }
}

/// NVRTC looks for its other half by name alone. Where it was not installed for the whole system, that is found only if
/// it is loaded already.
fn builtins_beside(path: &Path) -> Option<Library> {
    let folder = path.parent().filter(|folder| folder.is_absolute())?;
    let files = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let named = |file: &std::path::PathBuf| {
        file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so."))
    };
    // SAFETY: as for NVRTC itself.
    files.filter(named).find_map(|file| unsafe { Library::new(file) }.ok())
}

/// Asks for a length and then for so many bytes.
fn fetch(program: Program, size: Size, text: Text) -> Option<Vec<u8>> {
    let mut length = 0;
    // SAFETY: the program lives; the length is ours.
    if unsafe { size(program, &raw mut length) } != 0 {
        return None;
    }
    let mut bytes = vec![0u8; length];
    // SAFETY: there is room for the length that was just named.
    (unsafe { text(program, bytes.as_mut_ptr().cast()) } == 0).then_some(bytes)
}

struct Destroyed<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Destroyed<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was made by this library and is destroyed only here.
        unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
    }
}
