// What the app uses of Apple's os module, for a type check on Linux.
public func os_proc_available_memory() -> Int { fatalError() }
