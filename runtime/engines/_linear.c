/* What Python calls of the linear layers with quantized weights, and the kernels in use, for the other compiled stages. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "_linear.h"

static LinearKernels in_use;

#define PACK_ARGS 8

/* Pointers arrive as integers; the caller owns the memory and has checked shapes. */
static PyObject *py_pack(PyObject *self, PyObject *const *objects, Py_ssize_t given) {
    long number[PACK_ARGS];
    void *pointer[PACK_ARGS];
    if (given != PACK_ARGS) return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", PACK_ARGS, given);
    for (int i = 0; i < PACK_ARGS; i++) {
        number[i] = PyLong_AsLong(objects[i]);
        pointer[i] = (void *)number[i];
        if (number[i] == -1 && PyErr_Occurred()) return NULL;
    }
    linear_pack(pointer[0], number[1], number[2], pointer[3], pointer[4], pointer[5], pointer[6], pointer[7]);
    Py_RETURN_NONE;
}

static PyObject *py_processors(PyObject *self, PyObject *none) {
    PyObject *names = PyList_New(0);
    for (const LinearProcessor *p = linear_processors; names && p->name; p++) {
        if (!p->is_here()) continue;
        PyObject *name = PyUnicode_FromString(p->name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_use(PyObject *self, PyObject *wanted) {
    const char *name = PyUnicode_AsUTF8(wanted);
    if (!name) return NULL;
    for (const LinearProcessor *p = linear_processors; p->name; p++)
        if (strcmp(p->name, name) == 0 && p->is_here()) {
            in_use = p->kernels;
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "no kernels for %s here", name);
    return NULL;
}

static PyMethodDef methods[] = {
    {"pack", (PyCFunction)(void (*)(void))py_pack, METH_FASTCALL,
     "pack(weights, outputs, inputs, scale, least, scale_half, least_half, packed)"},
    {"processors", py_processors, METH_NOARGS, "processors() -> those whose kernels run here, the best first"},
    {"use", py_use, METH_O, "use(processor)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_linear", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__linear(void) {
    const LinearProcessor *best = linear_processors;
    while (!best->is_here()) best++;
    in_use = best->kernels;
    PyObject *made = PyModule_Create(&module), *kernels = PyCapsule_New(&in_use, LINEAR_KERNELS, NULL);
    if (!made || !kernels || PyModule_AddObjectRef(made, "kernels", kernels)) Py_CLEAR(made);
    Py_XDECREF(kernels);
    return made;
}
