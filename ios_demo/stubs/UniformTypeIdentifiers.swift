// What the app uses of UniformTypeIdentifiers, for a type check on Linux.
public struct UTType: Hashable, Sendable {
    public static var data: UTType { fatalError() }
    public static var folder: UTType { fatalError() }
    public static var json: UTType { fatalError() }
    public static var zip: UTType { fatalError() }
}
